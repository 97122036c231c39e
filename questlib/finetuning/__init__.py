"""QuEST's selective, progressive finetuning (paper, Sec. 3.3)."""
