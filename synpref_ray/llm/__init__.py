"""LLM steps: tag a pair with the paper's five attributes, judge which of its two replies is better (arXiv 2507.01352, Sec. 3.1 and 3.2,
Steps 2 and 3).
"""
