"""Is this gradient right? `gradcheck` compares it with numerical derivatives (numbers.py); diagnosis.py names the
mistake."""

from .gradcheck import Element, GradcheckError, Report, gradcheck

__all__ = ["Element", "GradcheckError", "Report", "gradcheck"]
