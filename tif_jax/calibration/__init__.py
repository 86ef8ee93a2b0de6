"""How many tokens go in which block: the schedule of a reducer with which a model changes least, without labels."""
