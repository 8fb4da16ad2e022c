"""Wake-up latency of an important call, against half of EEVDF's at p99, and the distance from CPU
shares and limits, against 2 points and 2 %."""
