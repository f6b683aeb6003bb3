"""What tests measured, by title: printed at the end of their output."""

from collections import defaultdict

sections: dict[str, list[str]] = defaultdict(list)
