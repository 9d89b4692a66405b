"""Is this gradient right? `gradcheck` compares it with numbers (numbers.py), and says what is wrong (diagnosis.py)."""

from .gradcheck import Element, GradcheckError, Report, gradcheck

__all__ = ["Element", "GradcheckError", "Report", "gradcheck"]
