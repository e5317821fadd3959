"""Which topology carries an exchange out: by a cost model with measured figures, and a trial."""
