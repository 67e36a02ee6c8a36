"""What a step did: realised changes, sweeps of the learning rate, fresh responses after it.

==================  ===========================================================================
``steps``           the record of a step
``measure``         which entropy is compared before and after, and its linear term
``changes``         the record of a realised change, and the mean of several
``scoring``         the responses scored after a virtual step
``floor``           below which size a change is rounding; ``rounding`` draws what it is read from
``realize``         one step, by every measure
``rows``            every step on every batch: the rows of the report
``sweep``           the change along a step, by factors of the learning rate
``resampling``      fresh responses drawn after the step
==================  ===========================================================================
"""
