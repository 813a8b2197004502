"""Conversations → device batches, in which what several conversations begin with is there only once.

Conversations → tokens (`encoding.py`) → prefix trees (`tree.py`) → rows (`rows.py`) and their masks
(`masks.py`) → device batches (`collator.py`), with images or what the vision tower made of them
(`pictures.py`).

Shapes in this package are written in words:

    rows        of a device batch, as the model sees it: packed, each holds many conversations
    tokens      of a row; what is shorter is padded on the right
    images      in the order of their placeholders, row by row
    tiles       pieces that all images are cut into (NeXT, OneVision); else an image is one tile
    positions   what the tower makes of a tile: a vector for each patch and, in CLIP, one more
    layers      hidden states of the tower that the projector takes
    width       of such a hidden state

A packed row of three conversations: two questions about one image (its placeholders are `#`), and one
question without an image. Every token is a character here: `^` begins a text, `$` is the stop token.

    conversation 0   ^ # # a ? x $          ^ ─┬─ # # ─┬─ a ? x $   0
    conversation 1   ^ # # b ? y $     →       │       └─ b ? y $   1     the tree
    conversation 2   ^ c ? z $                 └─ c ? z $           2

    place            0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    input_ids        ^  #  #  a  ?  x  $  b  ?  y  $  c  ?  z  $          the row, in pre-order
    positions        0  1  2  3  4  5  6  3  4  5  6  1  2  3  4          in a token's own conversation
    ends            15 11 11  7  7  7  7 11 11 11 11 15 15 15 15          where its subtree ends
    labels           .  .  .  .  .  x  $  .  .  y  $  .  .  z  $          `.` is -100

Token i sees token j exactly if j <= i < ends[j]. The `y` in place 9 sees `^ # #` (they end at 15 and 11) and
`b ? y`, but not `a ? x $`, which ends at 7. So it is computed as in a row of its own, at the same positions.
The image is in the batch once (`tests/test_rows.py` compares this drawing with what the code lays out).
"""

from .collator import PackedCollator
from .encoding import Encoded, Encoder

__all__ = ["Encoded", "Encoder", "PackedCollator"]
