"""A federation over Flower (https://flower.ai): its SuperLink and SuperNodes carry the messages, and what is computed
at both ends is what silos and their server compute. `jaxdist.flower` makes the apps.

Needs the extra `jaxdist[flower]`; only `rules` can be imported without it.
"""
