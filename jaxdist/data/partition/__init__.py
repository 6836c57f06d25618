"""Which client holds which training samples.

Sizes (`sizes`), labels (`labels`, made to fit by `fitting` and `repair`) and features (`features`) are aspects that
compose; `build` makes them one `Partition`, `describe` measures it, `manifest` keeps it, `picture` draws it.
"""
