// Outbox is an HTTP server whose handler promises a mail: once it has answered, the mail is in a folder, and is sent exactly once
// even if the process is killed.
//
//	go run ./examples/outbox
//	curl -d id=1234 -d email=ann@example.org http://localhost:8080/orders
//	curl http://localhost:8080/orders/1234
//
// SMTP_URL names the relay, as in smtps://apikey:KEY@smtp.sendgrid.net:465. Without it a fake relay in the process accepts the
// mail, so that you can try it without an account. Ctrl-C or SIGTERM shuts it down.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	netmail "net/mail"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/sqlitestore"
	"github.com/smtprelay/smtprelay/smtptest"
)

func main() {
	dir := flag.String("dir", "outbox-data", "folder of the outbox")
	from := flag.String("from", "shop@example.com", "envelope sender and From of the mails")
	listen := flag.String("listen", "localhost:8080", "where to serve HTTP")
	flag.Parse()
	if err := run(*dir, *from, *listen, os.Getenv("SMTP_URL")); err != nil {
		slog.Error(err.Error())
		os.Exit(1)
	}
}

func run(dir, from, listen, url string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var cfg smtprelay.Config
	if url == "" {
		slog.Warn("SMTP_URL is not set: a fake relay accepts the mail, and none leaves this program")
		relay := smtptest.NewServer()
		defer relay.Close()
		cfg = relay.Config()
	} else {
		var err error
		if cfg, err = smtprelay.ParseURL(url); err != nil {
			return err
		}
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	return serve(ctx, l, cfg, dir, from)
}

// serve answers requests from l, and sends the promised mails, until ctx ends. Then it finishes what is in progress.
func serve(ctx context.Context, l net.Listener, cfg smtprelay.Config, dir, from string) (err error) {
	store, err := sqlitestore.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	client, err := smtprelay.New(cfg)
	if err != nil {
		return err
	}
	defer client.Close()
	box, err := outbox.New(outbox.Config{Store: store, Client: client, Ended: func(i outbox.Item) {
		slog.Info("mail", "id", i.ID, "state", i.State.String(), "attempts", i.Attempts, "reason", i.Reason)
	}})
	if err != nil {
		return err
	}
	for i, err := range box.List(ctx, outbox.Unknown) { // a person has to check these
		if err != nil {
			return err
		}
		slog.Warn("the outcome of this mail is unknown", "id", i.ID, "reason", i.Reason)
	}

	mux := http.NewServeMux()
	shop := &shop{box: box, from: from}
	mux.HandleFunc("POST /orders", shop.place)
	mux.HandleFunc("GET /orders/{id}", shop.show)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	failed := make(chan error, 2)
	go func() { failed <- server.Serve(l) }() // ends by Shutdown, or if the listener fails
	go func() { failed <- box.Run(ctx) }()    // ends by stop
	slog.Info("serving", "url", fmt.Sprintf("http://%s/orders", l.Addr()), "relay", cfg.Addr)
	left := 2
	select {
	case err = <-failed:
		left--
	case <-ctx.Done():
	}
	stop()
	end, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = errors.Join(err, server.Shutdown(end))
	for range left {
		if e := <-failed; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
	}
	return errors.Join(err, client.Shutdown(end))
}

// shop confirms orders by mail.
type shop struct {
	box  *outbox.Outbox
	from string
}

// place accepts an order. A customer who does not see the answer asks again: the order's number is the mail's ID, so that the
// mail is sent once.
func (s *shop) place(w http.ResponseWriter, r *http.Request) {
	id := r.PostFormValue("id")
	to, err := netmail.ParseAddress(r.PostFormValue("email"))
	if err != nil || id == "" {
		http.Error(w, "An order has an id and an email.", http.StatusBadRequest)
		return
	}
	text := fmt.Sprintf("From: <%s>\r\nTo: %s\r\nSubject: Your order\r\nDate: %s\r\nMessage-ID: <%x@%s>\r\n\r\nThank you for your order.\r\n",
		s.from, to, time.Now().Format(time.RFC1123Z), id, "shop.example.com")
	err = s.box.Enqueue(r.Context(), outbox.Message{ID: id, From: s.from, To: []string{to.Address}, Body: smtprelay.Bytes([]byte(text))})
	if err != nil {
		slog.Error("enqueue", "id", id, "err", err)
		http.Error(w, "Your order could not be taken. Please try again.", http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusAccepted)
	fmt.Fprintln(w, "A mail will confirm your order.")
}

func (s *shop) show(w http.ResponseWriter, r *http.Request) {
	i, err := s.box.Status(r.Context(), r.PathValue("id"))
	switch {
	case errors.Is(err, outbox.ErrNotFound):
		http.NotFound(w, r)
	case err != nil:
		http.Error(w, "Please try again.", http.StatusServiceUnavailable)
	default:
		fmt.Fprintln(w, i.State)
	}
}
