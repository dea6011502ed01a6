# Sourced by check.sh, and before bench.py: installs the wheels of .whl/ for this shell if there are any.
# `python3` is the interpreter whose torch sees the GPU; PYTHON=... names another one.
PYTHON=${PYTHON:-python3}
if ls .whl/*.whl >/dev/null 2>&1 && [ ! -d /tmp/grpo-ext-wheels ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target /tmp/grpo-ext-wheels .whl/*.whl || { rm -rf /tmp/grpo-ext-wheels; return 1; }
fi
if [ -d /tmp/grpo-ext-wheels ]; then
    export PYTHONPATH=/tmp/grpo-ext-wheels${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
