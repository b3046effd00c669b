"""Which method fine-tunes best for what it trains: a matrix of training runs, and tables of them."""
