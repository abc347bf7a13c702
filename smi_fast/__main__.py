"""``python -m smi_fast`` does what ``smi-fast`` does."""

from smi_fast.cli import main

if __name__ == "__main__":
    main()
