package admin

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// keyStates maps the key states of the API to those of the domain. Unspecified matches keys in any state.
var keyStates = map[adminv1.KeyState]keys.State{
	adminv1.KeyState_KEY_STATE_UNSPECIFIED: 0,
	adminv1.KeyState_KEY_STATE_LIVE:        keys.Live,
	adminv1.KeyState_KEY_STATE_EXPIRED:     keys.Expired,
	adminv1.KeyState_KEY_STATE_REVOKED:     keys.Revoked,
}

// keyProto converts k. Its state is the state at s.Keys.Now(), which may differ from the system clock.
func (s *Server) keyProto(k keys.Key) *adminv1.Key {
	key := &adminv1.Key{
		Id:           k.ID,
		Name:         k.Name,
		Namespaces:   k.Namespaces,
		CreatedAt:    timeProto(k.CreatedAt),
		CreatedBy:    k.CreatedBy,
		ExpiresAt:    timeProto(k.ExpiresAt),
		RevokedAt:    timeProto(k.RevokedAt),
		Revocation:   string(k.Revocation),
		ReplacedBy:   k.ReplacedBy,
		SigningKeyId: k.SigningKeyID,
		Requests:     k.Requests,
		LastUsedAt:   timeProto(k.LastUsedAt),
	}
	for _, scope := range k.Scopes {
		key.Scopes = append(key.Scopes, string(scope))
	}
	switch k.StateAt(s.Keys.Now()) {
	case keys.Live:
		key.State = adminv1.KeyState_KEY_STATE_LIVE
	case keys.Expired:
		key.State = adminv1.KeyState_KEY_STATE_EXPIRED
	case keys.Revoked:
		key.State = adminv1.KeyState_KEY_STATE_REVOKED
	}
	if k.LastUsedFrom.IsValid() {
		key.LastUsedFrom = k.LastUsedFrom.String()
	}
	return key
}

func sandboxProto(r sandbox.Record) *adminv1.Sandbox {
	return &adminv1.Sandbox{
		Namespace: r.Name.Namespace,
		Name:      r.Name.Name,
		Id:        r.ID,
		State:     string(r.State),
		Reason:    strings.TrimSuffix(r.Reason+": "+r.Cause, ": "),
		Image:     r.Config.Image,
		Cpus:      int32(r.Config.CPUs),
		MemoryMib: int32(r.Config.MemoryMiB),
		DiskMib:   int32(r.Config.DiskMiB),
		CreatedAt: timeProto(r.CreatedAt),
	}
}

func imageProto(i sandbox.Image) *adminv1.Image {
	return &adminv1.Image{Name: i.Name, Digest: i.Digest, SizeBytes: i.Size, CreatedAt: timeProto(i.Created)}
}

func progressProto(p sandbox.ImportProgress) *adminv1.ImportProgress {
	return &adminv1.ImportProgress{Phase: string(p.Phase), Image: p.Image, Done: p.Done, Total: p.Total}
}

func restoredProto(r keys.Restored, signingKeyID string) *adminv1.RestoreResponse {
	return &adminv1.RestoreResponse{
		SigningKeyId: signingKeyID,
		Live:         int32(r.Live),
		Invalidated:  int32(r.Invalidated),
		TakenAt:      timeProto(r.TakenAt),
	}
}

// timeProto returns nil for the zero time.
func timeProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func toProtos[Record, Proto any](records []Record, convert func(Record) Proto) []Proto {
	out := make([]Proto, 0, len(records))
	for _, r := range records {
		out = append(out, convert(r))
	}
	return out
}
