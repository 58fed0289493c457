"""The frozen target, run on packed documents. It is never trained nor partitioned by ZeRO."""
