"""One's own model in one command: from unlabelled images and a budget to a folder that prunes the model.

The recipe is a small search whose trials are those of any sweep (`patchrank.trial`): golden scores, predictors and
repairs are made once, every setting that is tried leaves a record, and running again goes on where it stopped.
"""
