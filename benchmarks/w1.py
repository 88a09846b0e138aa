"""W1: 8 adapters x 1 x 1,024 tokens a step on a Llama-3-8B shape; peers train one adapter after another.

python -m benchmarks.w1 [the options of benchmarks.gpu]
"""

from benchmarks.gpu import main

if __name__ == "__main__":
    main(["w1"], description=__doc__)
