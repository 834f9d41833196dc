"""What of Flower is not public: a grid in this process, replies, the simulation backend."""
