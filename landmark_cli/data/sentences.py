"""Where sentences end, in any script: what expressions of it are made of."""

from __future__ import annotations

# A letter that a sentence may begin with: a capital, or one of a script that has none. Of scripts with two kinds of
# letters the common small ones are left out; others are taken for capitals, which cuts a sentence now and then.
FIRST_LETTER = r"[^\W\d_a-zß-öø-ÿά-ώа-џ]"
# Behind these no space follows. Inside of a set.
FULL_WIDTH_ENDS = "。！？"
# Before a space. Inside of a set.
ENDS = ".!?؟۔।"
