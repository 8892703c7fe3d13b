"""`parity`: one config under many strategies and worlds, compared with a plain single-process loop, and explained."""
