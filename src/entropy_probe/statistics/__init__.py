"""What the numbers say and how sure they are, from NumPy arrays alone: no model is known here.

=============================  ==========================================================================================
``unit_dots``                  the dot products of unit vectors that all the rest is computed from
``u_statistics``               U_cross, its row means and all of its errors: ``cross_statistics``
``jackknife``, ``this_step``   delete-one values and their variance; the error of what this very update does
``variance``                   the unbiased variance of U_cross and Hoeffding's two parts of it
``intervals``                  95 % intervals of U_cross: one method, one file
``shortfall``                  when an interval is known to cover less than it says
``needed_units``               how many units would settle a question
``noise``                      where the noise comes from: X, Y, or differences between prompts
``two_batches``                X of one batch against Y of another; folds of one batch
``importance_sampling``        the realised entropy change on common samples
``linearity``                  how far the linear picture of a step holds
``estimate``                   the record of a value with its error and interval, or the reason why there is none
``quantiles``, ``skewness``    Student's quantile with Satterthwaite's degrees of freedom; sample skewness and kurtosis
=============================  ==========================================================================================

Derivations: docs/method.md, sections 3, 5 and 7. Measured coverage of the intervals: docs/coverage.md.
"""
