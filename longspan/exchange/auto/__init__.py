"""Which topology carries an exchange out: by a cost model, with figures stated or measured."""
