"""`python -m peft_cpift.cli`, as `accelerate launch -m` wants it."""

from peft_cpift.cli import main

if __name__ == "__main__":
    main()
