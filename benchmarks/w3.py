"""W3: 64 adapters x 1 x 128 tokens a step on a Llama-3-8B shape.

python -m benchmarks.w3 [the options of benchmarks.gpu]
"""

from benchmarks.gpu import main

if __name__ == "__main__":
    main(["w3"], description=__doc__)
