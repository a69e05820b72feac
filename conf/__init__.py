"""The recipe's configs; installed as nemo_dist_conf.conf."""
