"""One model at many speeds: setting a speed, splitting images between routes, timing, pictures."""
