package portalclient

import (
	"context"
	"fmt"
	"slices"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// CreateContext implements sandbox.Portal.
func (c *Client) CreateContext(ctx context.Context, req sandbox.ContextRequest) (sandbox.Context, error) {
	res, err := call[portalv1.CreateContextResponse](ctx, c, contexts, portalv1.PortalService_CreateContext_FullMethodName, &portalv1.CreateContextRequest{
		Name: req.Name, Language: languages[req.Language], User: req.User, Cwd: req.Cwd, Environment: environment(req.Environment),
	})
	return contextOf(res.GetContext()), err
}

// maxContexts is more contexts than a portal has.
const maxContexts = 1000

// ListContexts implements sandbox.Portal.
func (c *Client) ListContexts(ctx context.Context) ([]sandbox.Context, error) {
	res, err := call[portalv1.ListContextsResponse](ctx, c, contexts, portalv1.PortalService_ListContexts_FullMethodName, &portalv1.ListContextsRequest{})
	if err != nil {
		return nil, err
	}
	if n := len(res.GetContexts()); n > maxContexts {
		return nil, classified{fmt.Sprintf("the sandbox sent a list of %d contexts", n), sandbox.ErrRunFailed}
	}
	var all []sandbox.Context
	for _, found := range res.GetContexts() {
		all = append(all, contextOf(found))
	}
	return all, nil
}

// RestartContext implements sandbox.Portal.
func (c *Client) RestartContext(ctx context.Context, name string, e sandbox.Environment) (sandbox.Context, error) {
	res, err := call[portalv1.RestartContextResponse](ctx, c, contexts, portalv1.PortalService_RestartContext_FullMethodName,
		&portalv1.RestartContextRequest{Name: name, Environment: environment(e)})
	return contextOf(res.GetContext()), err
}

// RemoveContext implements sandbox.Portal.
func (c *Client) RemoveContext(ctx context.Context, name string) error {
	_, err := call[portalv1.RemoveContextResponse](ctx, c, contexts, portalv1.PortalService_RemoveContext_FullMethodName,
		&portalv1.RemoveContextRequest{Name: name})
	return err
}

// Warm implements sandbox.Portal.
func (c *Client) Warm(ctx context.Context, wanted []sandbox.Language) ([]sandbox.Language, error) {
	req := &portalv1.WarmRequest{}
	for _, language := range wanted {
		req.Languages = append(req.Languages, languages[language])
	}
	res, err := call[portalv1.WarmResponse](ctx, c, warm, portalv1.PortalService_Warm_FullMethodName, req)
	var started []sandbox.Language
	for _, language := range wanted {
		if slices.Contains(res.GetLanguages(), languages[language]) {
			started = append(started, language)
		}
	}
	return started, err
}

// contextOf returns the context that a portal describes.
func contextOf(c *portalv1.Context) sandbox.Context {
	described := sandbox.Context{
		Name: bounded.Text(c.GetName(), maxErrorText), User: bounded.Text(c.GetUser(), maxErrorText), Cwd: bounded.Text(c.GetCwd(), maxErrorText),
		PID: c.GetPid(), Runs: c.GetCount(), Busy: c.GetBusy(),
	}
	for language, id := range languages {
		if id == c.GetLanguage() {
			described.Language = language
		}
	}
	return described
}
