// Webservice is an HTTP server whose handler sends a mail, through one Client that all requests share.
//
//	SMTP_URL='smtps://apikey:KEY@smtp.sendgrid.net:465' go run ./examples/webservice -from shop@example.com
//	curl -d email=ann@example.org http://localhost:8080/signup
//
// Ctrl-C or SIGTERM shuts it down: it accepts no new request, answers those in progress, and ends connections to the relay with
// QUIT. Without SMTP_URL a fake relay accepts the mail, so that you can try it without an account.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	netmail "net/mail"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func main() {
	from := flag.String("from", "shop@example.com", "envelope sender and From of the mails")
	listen := flag.String("listen", "localhost:8080", "where to serve HTTP")
	flag.Usage = usage
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	cfg, done, err := relayConfig(os.Getenv("SMTP_URL"))
	if err == nil {
		cfg.Trace = smtprelay.LogTrace(slog.Default())
		var l net.Listener
		if l, err = net.Listen("tcp", *listen); err == nil {
			err = serve(ctx, l, cfg, *from)
		}
		done()
	}
	if err != nil {
		slog.Error(err.Error())
		os.Exit(1)
	}
}

func usage() {
	fmt.Fprintln(flag.CommandLine.Output(), "usage: [SMTP_URL=smtps://user:password@host:465] webservice [flags]\nWithout SMTP_URL a fake relay accepts the mail.")
	flag.PrintDefaults()
}

// relayConfig returns the configuration for the relay at relayURL, or for a fake one if it is empty, and a func to call at the
// end.
func relayConfig(relayURL string) (cfg smtprelay.Config, done func(), err error) {
	if relayURL == "" {
		slog.Warn("SMTP_URL is not set: a fake relay accepts the mail, and none leaves this program")
		relay := smtptest.NewServer()
		return relay.Config(), relay.Close, nil
	}
	cfg, err = smtprelay.ParseURL(relayURL)
	return cfg, func() {}, err
}

// serve answers requests from l until ctx ends, and then finishes what is in progress.
func serve(ctx context.Context, l net.Listener, cfg smtprelay.Config, from string) error {
	client, err := smtprelay.New(cfg)
	if err != nil {
		return err
	}
	defer client.Close()
	// Find a wrong address or key now, not with the first customer. A relay that says nothing, such as one whose port uses
	// another kind of TLS, could take minutes.
	ping, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := client.Ping(ping); err != nil {
		return err
	}
	slog.Info("serving", "url", fmt.Sprintf("http://%s/signup", l.Addr()), "relay", cfg.Addr)

	mux := http.NewServeMux()
	mux.Handle("POST /signup", &signup{client: client, from: from})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }() // ends by Shutdown, or if the listener fails
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}

	// The order matters: first the handlers, which use the client, then the client.
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	err = server.Shutdown(ctx)
	s := client.Stats()
	slog.Info("stopping", "accepted", s.Accepted, "not_accepted", s.NotAccepted, "unknown", s.Unknown)
	return errors.Join(err, client.Shutdown(ctx))
}

// signup sends new users a welcome mail.
type signup struct {
	client *smtprelay.Client
	from   string
}

func (s *signup) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	to, err := netmail.ParseAddress(r.PostFormValue("email"))
	if err != nil {
		http.Error(w, "This is not an e-mail address.", http.StatusBadRequest)
		return
	}
	text := fmt.Sprintf("From: <%s>\r\nTo: %s\r\nSubject: Welcome\r\nDate: %s\r\nMessage-ID: <%s@example.com>\r\n"+
		"List-Unsubscribe: <https://example.com/unsubscribe?address=%s>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n\r\nIt is good to have you here.\r\n",
		s.from, to, time.Now().Format(time.RFC1123Z), rand.Text(), url.QueryEscape(to.Address))

	// If the relay takes longer than this, tell the customer. Do not use the request's own context, which ends when the customer
	// goes away: between the final dot and its reply that would leave a mail with an unknown outcome.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 20*time.Second)
	defer cancel()
	_, err = s.client.Send(ctx, smtprelay.Message{
		From: s.from,
		To:   []string{to.Address},
		Body: smtprelay.Bytes([]byte(text)),
	})

	var e *smtprelay.Error
	switch {
	case err == nil:
		fmt.Fprintln(w, "A mail is on its way to you.")
	case !errors.As(err, &e) || e.Outcome == smtprelay.Unknown:
		http.Error(w, "A mail may be on its way to you. If none comes within the hour, please sign up again.", http.StatusAccepted)
	case smtprelay.ShouldRetry(err):
		w.Header().Set("Retry-After", "60")
		http.Error(w, "No mail can be sent just now. Please try again in a minute.", http.StatusServiceUnavailable)
	case e.Op == smtprelay.OpCheck || e.Op == smtprelay.OpRcpt:
		http.Error(w, "There is no mailbox of this name.", http.StatusUnprocessableEntity)
	default:
		http.Error(w, "No mail could be sent. We have been notified.", http.StatusInternalServerError)
	}
}
