"""The frozen target: what it makes of packed documents. It is never trained and never partitioned by ZeRO."""
