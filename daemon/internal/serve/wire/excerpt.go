package wire

// Excerpt asks for the beginning and the end of the output of a run, as one line, instead of all of it.
type Excerpt struct {
	// Bytes is about how many bytes of the output are wanted.
	Bytes int
	// File is where all of the output is if some of it was left out. The call sets it. It is nil if nothing was left out, or
	// if the file could not be written.
	File *OutputFile
}

// OutputFile is a file in a sandbox with the output of a run.
type OutputFile struct {
	Namespace, Sandbox string
	Path               string // absolute
	Size               int    // in bytes
}
