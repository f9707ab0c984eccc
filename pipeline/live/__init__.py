"""The live lane's doors: LiveKit's generator, and a local page over WebRTC. The worker uses none of it."""
