"""Colours that tell stages apart on light and dark pages, also for people who do not see red and green apart."""

from __future__ import annotations

SLOTS = ("#4c8fe0", "#e69138", "#35a583", "#a87de0", "#d9658b", "#b5a22c", "#5fb8d6", "#8a8f98")
_USUAL = {"encode": 0, "denoise": 1, "decode": 2, "write": 3}
USE_COLOURS = {"busy": "#35a583", "load": "#b5a22c", "blocked": "#d9658b", "starving": "#8a8f98"}
MARK_COLOURS = {"retag": "#f2c744", "joined": "#35a583", "left": "#d9658b"}
OTHERS = len(SLOTS) - 1


class Palette:
    """Gives each stage name a slot as it comes; the last slot is for all that come late."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}

    def slot(self, stage: str) -> int:
        if stage not in self._slots:
            usual = _USUAL.get(stage)
            taken = set(self._slots.values())
            spare = (place for place in range(len(_USUAL), OTHERS) if place not in taken)
            self._slots[stage] = next(spare, OTHERS) if usual is None else usual
        return self._slots[stage]

    def colour(self, stage: str) -> str:
        return SLOTS[self.slot(stage)]

    def known(self) -> list[tuple[str, str]]:
        """Names and colours, in the order of slots."""
        return [(name, SLOTS[slot]) for name, slot in sorted(self._slots.items(), key=lambda entry: entry[1])]
