package callsites

import (
	"context"

	"github.com/smtprelay/smtprelay"
)

// tenants sends each tenant's mail through the tenant's own relay, which may change at any time. A URL with "ca=" needs a Name
// too: see [smtprelay.Registry].
type tenants struct {
	mail smtprelay.Registry
	urls func(tenant string) (string, error) // from a database
}

func (t *tenants) Send(ctx context.Context, tenant string, m smtprelay.Message) error {
	url, err := t.urls(tenant)
	if err != nil {
		return err
	}
	cfg, err := smtprelay.ParseURL(url)
	if err != nil {
		return err
	}
	_, err = t.mail.Send(ctx, cfg, m)
	return err
}
