import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for reward_functions, as the command line does for the current folder
