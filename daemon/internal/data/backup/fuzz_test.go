package backup

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// FuzzArchive checks that readArchive survives any content, and that it either returns a classified error or exactly the
// data that the manifest describes.
func FuzzArchive(f *testing.F) {
	f.Add(smallArchive(f))
	f.Add([]byte{})
	f.Add(smallArchive(f)[:1000])
	f.Add(bytes.Replace(smallArchive(f), []byte("msb.db"), []byte("../../"), 2))
	f.Fuzz(func(t *testing.T, data []byte) {
		var db bytes.Buffer
		m, keyring, err := readArchive(bytes.NewReader(data), &db)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsDataLoss(err) && !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("readArchive: %v, want invalid argument, data loss or failed precondition", err)
			}
			return
		}
		for i, content := range []string{keyring.Reveal(), db.String()} {
			if got, err := copyMember(m.Members[i].Name, io.Discard, strings.NewReader(content)); err != nil || got != m.Members[i] {
				t.Fatalf("%+v, %v, want %+v", got, err, m.Members[i])
			}
		}
	})
}

func smallArchive(t testing.TB) []byte {
	t.Helper()
	m := manifest{Format: formatName, Version: formatVersion, TakenAt: time.Unix(1e9, 0).UTC(), InstanceID: "i", SigningKeyID: "k"}
	contents := []string{`{"version":1}`, "store", "{}\n"}
	var readers []io.Reader
	for i, name := range []string{keyringName, storeName, auditName} {
		entry, err := copyMember(name, io.Discard, strings.NewReader(contents[i]))
		if err != nil {
			t.Fatal(err)
		}
		m.Members = append(m.Members, entry)
		readers = append(readers, strings.NewReader(contents[i]))
	}
	var b bytes.Buffer
	if err := writeArchive(&b, m, readers...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
