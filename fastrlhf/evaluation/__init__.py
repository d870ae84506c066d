"""Jobs made of the loops: `fastrlhf run`, its evaluation and report; what other jobs share."""
