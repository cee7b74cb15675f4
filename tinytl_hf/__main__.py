"""``python -m tinytl_hf``, which is also what ``accelerate launch -m tinytl_hf`` runs."""

from tinytl_hf.cli import main

if __name__ == "__main__":
    main()
