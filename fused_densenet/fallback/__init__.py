"""Why something runs operator by operator instead of fused, and how it runs then."""
