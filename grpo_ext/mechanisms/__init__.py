"""What `GRPOExtTrainer` adds to TRL's trainer, one mechanism a file, each a subclass of the one before:

publishing -> shared_prompt -> adapted_head -> shared_sampling -> dialogues -> rounds -> growth -> resampling
-> reference_kl -> dead_groups -> temperature -> replay -> resume -> recording -> guards -> trainer.py
"""
