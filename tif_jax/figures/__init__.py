"""Pictures: what a model sees in photographs, and the figures of a report.

colours  numbers -> colours: one map per quantity, and the legend that belongs to it
maps     arrays over the patch raster -> pictures: impact over a photograph, the tokens that are left
seen     a model, its reducers and a photograph -> everything that is drawn of it, as plain data
sheet    that -> a figure
page     that -> an HTML page that needs nothing else
plots    the figures of a report
view     `tif_jax.view`
"""
