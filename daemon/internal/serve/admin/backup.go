package admin

import adminv1 "github.com/msbd/msbd/api/msb/admin/v1"

// chunkSize is the size of a chunk in bytes. It is well below the limit on the size of a message.
const chunkSize = 64 << 10

// Backup implements AdminServiceServer.
func (s *Server) Backup(_ *adminv1.BackupRequest, stream adminv1.AdminService_BackupServer) error {
	uid := s.uid(stream.Context())
	if err := s.Backups.Write(stream.Context(), chunkWriter{stream}, uid); err != nil {
		return err
	}
	s.Log.Info("backup created", "uid", uid)
	return nil
}

// Restore implements AdminServiceServer.
func (s *Server) Restore(stream adminv1.AdminService_RestoreServer) error {
	uid := s.uid(stream.Context())
	restored, err := s.Backups.Restore(stream.Context(), &chunkReader{stream: stream}, uid)
	if err != nil {
		return err
	}
	s.Log.Warn("backup restored", "taken_at", restored.TakenAt, "live", restored.Live, "invalidated", restored.Invalidated, "uid", uid)
	return stream.SendAndClose(restoredProto(restored, s.Keys.SigningKey().ID))
}

// chunkWriter sends written data in chunks.
type chunkWriter struct {
	stream adminv1.AdminService_BackupServer
}

func (w chunkWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		chunk := p[n:min(n+chunkSize, len(p))]
		if err := w.stream.Send(&adminv1.BackupResponse{Chunk: chunk}); err != nil {
			return n, err
		}
		n += len(chunk)
	}
	return n, nil
}

// chunkReader reads the chunks that the client sends. It returns io.EOF only after the client has closed the stream, so
// that an interrupted upload is not mistaken for a complete archive.
type chunkReader struct {
	stream adminv1.AdminService_RestoreServer
	chunk  []byte // the unread rest of the last chunk
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for len(r.chunk) == 0 {
		req, err := r.stream.Recv()
		if err != nil {
			return 0, err // including io.EOF
		}
		r.chunk = req.GetChunk()
	}
	n := copy(p, r.chunk)
	r.chunk = r.chunk[n:]
	return n, nil
}
