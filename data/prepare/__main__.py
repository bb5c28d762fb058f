"""python -m data.prepare"""

from data.prepare.command import main

if __name__ == "__main__":
    main()
