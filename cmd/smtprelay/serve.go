package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/smtprelay/smtprelay/cmd/smtprelay/internal/devrelay"
)

// exitListen is the exit status of serve where it cannot listen, beside exitUsage.
const exitListen = 3

type serveFlags struct {
	cfg                     devrelay.Config
	passwordFile, tokenFile string
	faults                  []string
}

func newServe() *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Be a relay to develop against, with a web page and faults that are switched on and off",
		Long: `Serve is a relay to develop against. It takes mail and sends it nowhere; it keeps to limits as relays do, and what goes wrong
with relays goes wrong when you say so. A web page shows each dialogue while it happens, what has arrived and what was refused,
and switches faults; the same can be done over HTTP with JSON, by tests in any language. It prints the SMTP_URL to use and the
page's address, and ends with Ctrl-C.

A fault is a step, "=", a reply or what else happens, and perhaps options, separated by semicolons:

    --fault 'rcpt=450 4.2.1 later'                  each recipient, until it is switched off
    --fault 'rcpt=550 5.1.1 no such user; rcpt=bob@example.org'
    --fault 'dot=454 slow down; every=10; count=3'  each tenth message, three times
    --fault 'accepted=drop; count=1'                taken, but the client never learns it
    --fault 'mail=421 4.7.0 busy; drop; after-messages=5'
    --fault 'dot=delay=5s'    --fault 'connect=stall; connection=2'    --fault 'body=abort; after-bytes=1000'

Steps: ` + strings.Join(devrelay.Steps(), ", ") + `.
What happens: a reply, drop (FIN), abort (RST), stall, discard (what is pipelined after it), delay=2s.
Options: connection=2, rcpt=ADDRESS, after-messages=5, after-recipients=100, after-bytes=1000, pipelined, nth=3, every=10,
rate=14 (strikes what is faster), burst=14, count=1 (0: until it is switched off).

On loopback the page is open to who can reach it; elsewhere it needs a token, which is printed unless --token-file has it.
It speaks HTTP without TLS: put a proxy before it where others can listen.

Exit status: 0 ended by Ctrl-C, 2 usage or settings, 3 an address or a file could not be had.`,
		Args: takes(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.cfg.Listen, "listen", "127.0.0.1:2525", "`address` of SMTP")
	flags.StringVar(&f.cfg.HTTP, "http", "127.0.0.1:8025", "`address` of the page and the API")
	flags.StringVar(&f.tokenFile, "token-file", "", "`file` that holds the token of the page and the API")
	flags.StringVar(&f.cfg.Name, "name", "smtprelay.test", "`name` of the relay, in the greeting and the certificate")
	flags.StringVar(&f.cfg.Username, "user", "", "`user` that AUTH must give; without it AUTH is not offered")
	flags.StringVar(&f.passwordFile, "password-file", "", "`file` that holds the password; without it a random one is made")
	flags.StringVar(&f.cfg.TLS, "tls", "none", "none, starttls or implicit, with a certificate of its own")
	flags.StringVar(&f.cfg.CertFile, "cert-file", "", "`file` to write the certificate to, for clients to trust; without it a temporary one")
	flags.IntVar(&f.cfg.MaxConns, "max-conns", 10, "connections at once")
	flags.IntVar(&f.cfg.MaxMessages, "max-messages", 100, "messages on a connection")
	flags.IntVar(&f.cfg.MaxRecipients, "max-recipients", 1000, "recipients of a message")
	flags.Int64Var(&f.cfg.MaxSize, "max-size", 30<<20, "octets of a message")
	flags.Float64Var(&f.cfg.Rate, "rate", 0, "messages a second, above which 454 is answered; 0 is no limit")
	flags.DurationVar(&f.cfg.Delay, "delay", 0, "time of a round trip")
	flags.BoolVar(&f.cfg.Chunking, "chunking", false, "offer CHUNKING (BDAT)")
	flags.StringArrayVar(&f.faults, "fault", nil, "`fault` to begin with; may be repeated")
	flags.IntVar(&f.cfg.Keep, "keep", 10_000, "messages that are kept, the latest")
	flags.Int64Var(&f.cfg.KeepBytes, "keep-bytes", 256<<20, "octets that they may have in memory, all together")
	complete := func(flag string, words ...string) {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp|cobra.ShellCompDirectiveNoSpace))
	}
	complete("tls", "none", "starttls", "implicit")
	steps := devrelay.Steps()
	for i := range steps {
		steps[i] += "="
	}
	complete("fault", steps...)
	return cmd
}

func (f *serveFlags) run(cmd *cobra.Command) error {
	if err := f.read(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	relay, err := devrelay.Start(f.cfg)
	if err != nil {
		return &exit{exitListen, err}
	}
	f.announce(cmd.OutOrStdout(), relay)
	<-ctx.Done()
	stop() // a second Ctrl-C ends the program at once
	fmt.Fprintln(cmd.ErrOrStderr(), "\nStopping: what is under way is finished.")
	relay.Close()
	return nil
}

// read completes the configuration from files and checks it. Nothing listens before.
func (f *serveFlags) read() error {
	for _, text := range f.faults {
		fault, err := devrelay.ParseFault(text)
		if err != nil {
			return fmt.Errorf("--fault %q: %w", text, err)
		}
		f.cfg.Faults = append(f.cfg.Faults, fault)
	}
	var errs []error
	for _, from := range []struct {
		flag, file string
		secret     *string
	}{{"--password-file", f.passwordFile, &f.cfg.Password}, {"--token-file", f.tokenFile, &f.cfg.Token}} {
		var err error
		*from.secret, err = secretFile(from.flag, from.file)
		errs = append(errs, err)
	}
	if f.passwordFile == "" && f.cfg.Username != "" {
		f.cfg.Password = rand.Text()
	}
	if err := errors.Join(append(errs, f.cfg.Check())...); err != nil {
		return errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}

// announce prints how to reach the relay; the first line is one for a shell or a file .env.
func (f *serveFlags) announce(w io.Writer, relay *devrelay.Relay) {
	fmt.Fprintf(w, "SMTP_URL='%s'\n", strings.ReplaceAll(relay.SMTPURL(), "'", "%27"))
	fmt.Fprintf(w, "Page: %s\n", relay.PageURL())
	if f.tokenFile == "" && relay.Token() != "" {
		fmt.Fprintf(w, "Token: %s\n", relay.Token())
	}
}
