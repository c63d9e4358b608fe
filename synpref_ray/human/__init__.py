"""Human verdicts on preference pairs: who gives them, and how they enter as gold.

Paper: Sec. 3.2 (human verification of the seed and of the pairs picked each round).
"""

from synpref_ray.human.simulated import SimulatedAnnotator
from synpref_ray.human.verdict_file import ImportedVerdicts, VerdictImportReport, import_verdicts
from synpref_ray.human.verdicts import Annotator, Answer

__all__ = ["Annotator", "Answer", "ImportedVerdicts", "SimulatedAnnotator", "VerdictImportReport", "import_verdicts"]
