"""Pure mathematics: imports torch only, so that it can be read and tested without a trainer."""
