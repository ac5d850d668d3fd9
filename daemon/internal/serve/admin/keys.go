package admin

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// The default and the largest number of keys in a page of ListKeys.
const (
	defaultPage = 100
	maxPage     = 1000
)

// CreateKey implements AdminServiceServer.
func (s *Server) CreateKey(ctx context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	scopes := make([]keys.Scope, 0, len(req.GetScopes()))
	for _, scope := range req.GetScopes() {
		scopes = append(scopes, keys.Scope(scope))
	}
	secret, record, err := s.Keys.Issue(ctx, keys.IssueRequest{
		Name:       req.GetName(),
		Expire:     req.GetExpire(),
		Namespaces: req.GetNamespaces(),
		Scopes:     scopes,
		CreatedBy:  s.uid(ctx),
	})
	if err != nil {
		return nil, err
	}
	s.Log.Info("API key created", "key_id", record.ID, "name", record.Name, "uid", s.uid(ctx))
	return &adminv1.CreateKeyResponse{Key: secret.Reveal(), Info: s.keyProto(keys.Key{Record: record})}, nil
}

// ListKeys implements AdminServiceServer.
func (s *Server) ListKeys(_ context.Context, req *adminv1.ListKeysRequest) (*adminv1.ListKeysResponse, error) {
	state, ok := keyStates[req.GetState()]
	if !ok {
		return nil, fmt.Errorf("unknown key state %d: %w", req.GetState(), errdefs.ErrInvalidArgument)
	}
	size := int(req.GetPageSize())
	switch {
	case size < 0:
		return nil, fmt.Errorf("page size %d must not be negative: %w", size, errdefs.ErrInvalidArgument)
	case size == 0:
		size = defaultPage
	}
	filter := keys.Filter{Namespace: req.GetNamespace(), UnusedFor: req.GetUnusedFor(), State: state}
	keys, next, err := s.Keys.List(filter, req.GetPageToken(), min(size, maxPage))
	if err != nil {
		return nil, err
	}
	return &adminv1.ListKeysResponse{Keys: toProtos(keys, s.keyProto), NextPageToken: next}, nil
}

// GetKey implements AdminServiceServer.
func (s *Server) GetKey(_ context.Context, req *adminv1.GetKeyRequest) (*adminv1.GetKeyResponse, error) {
	key, err := s.Keys.Find(req.GetRef())
	if err != nil {
		return nil, err
	}
	return &adminv1.GetKeyResponse{Key: s.keyProto(key)}, nil
}

// RevokeKey implements AdminServiceServer.
func (s *Server) RevokeKey(ctx context.Context, req *adminv1.RevokeKeyRequest) (*adminv1.RevokeKeyResponse, error) {
	key, err := s.Keys.Revoke(ctx, req.GetRef(), s.uid(ctx))
	if err != nil {
		return nil, err
	}
	s.Log.Info("API key revoked", "key_id", key.ID, "name", key.Name, "uid", s.uid(ctx))
	return &adminv1.RevokeKeyResponse{Key: s.keyProto(key)}, nil
}

// RotateKey implements AdminServiceServer.
func (s *Server) RotateKey(ctx context.Context, req *adminv1.RotateKeyRequest) (*adminv1.RotateKeyResponse, error) {
	secret, created, old, err := s.Keys.Rotate(ctx, keys.RotateRequest{
		Ref: req.GetRef(), Grace: req.GetGrace(), Expire: req.GetExpire(), By: s.uid(ctx),
	})
	if err != nil {
		return nil, err
	}
	s.Log.Info("API key rotated", "key_id", old.ID, "replaced_by", created.ID, "name", created.Name, "uid", s.uid(ctx))
	return &adminv1.RotateKeyResponse{Key: secret.Reveal(), Info: s.keyProto(keys.Key{Record: created}), Old: s.keyProto(old)}, nil
}

// PruneKeys implements AdminServiceServer.
func (s *Server) PruneKeys(ctx context.Context, req *adminv1.PruneKeysRequest) (*adminv1.PruneKeysResponse, error) {
	keys, err := s.Pruner.Prune(ctx, req.GetDeadFor(), req.GetDryRun(), s.uid(ctx))
	if err != nil {
		return nil, err
	}
	if !req.GetDryRun() {
		s.Log.Info("API keys pruned", "count", len(keys), "uid", s.uid(ctx))
	}
	return &adminv1.PruneKeysResponse{Keys: toProtos(keys, s.keyProto)}, nil
}

// AcceptClock implements AdminServiceServer.
func (s *Server) AcceptClock(ctx context.Context, req *adminv1.AcceptClockRequest) (*adminv1.AcceptClockResponse, error) {
	c, err := s.Keys.AcceptClock(ctx, req.GetDryRun(), s.uid(ctx))
	if err != nil {
		return nil, err
	}
	return &adminv1.AcceptClockResponse{
		From: timeProto(c.From), To: timeProto(c.To),
		Revived: int32(c.Revived), Expired: int32(c.Expired), Revoked: int32(c.Revoked),
	}, nil
}

// Reset implements AdminServiceServer.
func (s *Server) Reset(ctx context.Context, _ *adminv1.ResetRequest) (*adminv1.ResetResponse, error) {
	invalidated, err := s.Keys.Reset(ctx, s.uid(ctx))
	for errors.Is(err, unix.ENOSPC) && s.MakeRoom() { // the keyring could not be written
		invalidated, err = s.Keys.Reset(ctx, s.uid(ctx))
	}
	if err != nil {
		return nil, err
	}
	return &adminv1.ResetResponse{SigningKeyId: s.Keys.SigningKey().ID, Invalidated: int32(invalidated)}, nil
}
