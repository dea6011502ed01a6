"""Configs of the models that the recipes use, for tests without the Hub.

The sizes are those of each model's config.json on the Hub, compared number by number with torchtune's builders, which
cite the same files (pytorch/torchtune, torchtune/models/qwen2_5/_model_builders.py).
"""

from transformers import Qwen2Config

QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 2, "tie_word_embeddings": True}
CONFIGS = {
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        **QWEN, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        **QWEN, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12
    ),
    "Qwen/Qwen2.5-3B-Instruct": Qwen2Config(
        **QWEN, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        **QWEN | {"vocab_size": 152064, "num_key_value_heads": 4, "tie_word_embeddings": False},
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
    ),
}
