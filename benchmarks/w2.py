"""W2: 1 adapter x 8 x 1,024 tokens a step on a Llama-3-8B shape, without and with recomputed activations.

python -m benchmarks.w2 [the options of benchmarks.gpu]
"""

from benchmarks.gpu import main

if __name__ == "__main__":
    main(["w2"], description=__doc__)
