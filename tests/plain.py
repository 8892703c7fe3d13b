"""The plain loop that everything is compared with: see disttrain.testing.plain."""

from disttrain.testing.plain import cosine_rates, plain_loop

__all__ = ["cosine_rates", "plain_loop"]
