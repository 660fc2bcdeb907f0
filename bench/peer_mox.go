// mox's smtpclient: the one Go client that pipelines within a message.

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"

	"github.com/mjl-/mox/dns"
	"github.com/mjl-/mox/sasl"
	"github.com/mjl-/mox/smtpclient"
)

func runMox(j job, src *source, t *tally) error {
	mode := map[tlsMode]smtpclient.TLSMode{
		tlsNone: smtpclient.TLSSkip, tlsStart: smtpclient.TLSRequiredStartTLS, tlsImplicit: smtpclient.TLSImmediate,
	}[j.TLS]
	local, remote := dns.Domain{ASCII: hello}, dns.Domain{ASCII: "localhost"}
	opts := smtpclient.Opts{Auth: func([]string, *tls.ConnectionState) (sasl.Client, error) {
		return sasl.NewClientPlain(username, password), nil
	}}
	log := slog.New(slog.DiscardHandler)
	ctx := context.Background()
	return keep(j, src, t, keeper[*smtpclient.Client]{
		dial: func() (*smtpclient.Client, error) {
			conn, err := j.connect()
			if err != nil {
				return nil, err
			}
			return smtpclient.New(ctx, log, conn, mode, true, local, remote, opts)
		},
		send: func(c *smtpclient.Client, message []byte, _ int64) error {
			return c.Deliver(ctx, sender, recipient, int64(len(message)), bytes.NewReader(message), false, false, false)
		},
		quit: func(c *smtpclient.Client) { c.Close() },
	})
}
