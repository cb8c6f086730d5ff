"""What is fastest on this machine: measured once by `fastattn tune`, kept in the user's cache folder, read by
`optimize(mode="auto")`.

`machine` tells machines apart, `outcome` is what is kept, `cache` the file, `trials` how one question is
measured, and each question has a file of its own: `fills` (packing), `backends`, `precisions`, `threads`,
`multiples`. `tuner` asks them all. Nothing is imported here: `optimize` needs no more than the file.
"""
