package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"strings"

	"github.com/joho/godotenv"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/smtprelay/smtprelay"
)

const relayHelp = `The relay is a URL: smtps://USER:PASSWORD@HOST:465 (TLS from the first byte),
smtp://USER:PASSWORD@HOST:587 (STARTTLS) or smtp+insecure://HOST:25 (no TLS).
It is read from --relay-file, --relay, SMTP_URL in the environment, SMTP_URL in
the file .env, or a prompt: the first that is there. --relay may not have a
password, since others see the command line; that is read from --password-file,
SMTP_PASSWORD or a prompt.`

// relayFlags say where the relay and its password come from.
type relayFlags struct {
	url, file, passwordFile, envFile string
	none                             bool // the command has none of these flags
}

// or names a flag as another way, where the command has it.
func (f *relayFlags) or(flag string) string {
	if f.none {
		return ""
	}
	return " or a file (" + flag + ")"
}

func (f *relayFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.url, "relay", "", "the relay's `URL`, without a password")
	flags.StringVar(&f.file, "relay-file", "", "`file` that holds the relay's URL")
	flags.StringVar(&f.passwordFile, "password-file", "", "`file` that holds the password")
	flags.StringVar(&f.envFile, "env-file", ".env", "`file` with SMTP_URL and SMTP_PASSWORD, where the environment has none")
}

// A setting is a relay, and for people where it was found.
type setting struct {
	cfg  smtprelay.Config
	from string
}

// read finds the relay. Prompts are written to the terminal, if ask allows them and there is one.
func (f *relayFlags) read(ask bool) (setting, error) {
	env, err := f.environment()
	if err != nil {
		return setting{}, err
	}
	rawURL, from, err := f.rawURL(env)
	if err != nil {
		return setting{}, err
	}
	if rawURL == "" && ask {
		rawURL, err = prompt("Relay, such as smtp://USER@HOST:587: ", false)
		from = "the prompt"
	}
	if rawURL == "" || err != nil {
		return setting{}, fmt.Errorf("no relay is set: put its URL, such as smtps://USER:PASSWORD@HOST:465, into SMTP_URL (in the environment or in %s)%s", f.envFile, f.or("--relay-file"))
	}
	if u, err := url.Parse(rawURL); err == nil && u.User != nil {
		if _, has := u.User.Password(); !has {
			password, err := f.password(env, ask, u.User.Username(), u.Host)
			if err != nil {
				return setting{}, err
			}
			if password == "" {
				return setting{}, fmt.Errorf("the relay's URL (%s) has a user and no password: put the password into SMTP_PASSWORD%s, or take the user out if the relay wants no login", from, f.or("--password-file"))
			}
			u.User = url.UserPassword(u.User.Username(), password)
			rawURL = u.String()
		}
	}
	cfg, err := smtprelay.ParseURL(rawURL)
	if err != nil {
		if e, ok := errors.AsType[*smtprelay.Error](err); ok && e.Err != nil {
			err = e.Err
		}
		return setting{}, fmt.Errorf("the relay's URL (%s) is wrong: %s", from, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return setting{cfg, from}, nil
}

// environment returns how to look up a variable: in the environment, else in the file.
func (f *relayFlags) environment() (func(string) (value, from string), error) {
	file := map[string]string{}
	if f.envFile != "" {
		var err error
		file, err = godotenv.Read(f.envFile)
		if errors.Is(err, fs.ErrNotExist) && (f.envFile == ".env" || f.envFile == sendmailEnv) {
			err = nil
		}
		if _, ok := errors.AsType[*fs.PathError](err); err != nil && !ok {
			err = fmt.Errorf("%s cannot be read: want lines such as SMTP_URL='smtps://USER:PASSWORD@HOST:465'", f.envFile) // the parser's error quotes the line, password and all
		}
		if err != nil {
			return nil, err
		}
	}
	return func(name string) (string, string) {
		if value := os.Getenv(name); value != "" {
			return value, name
		}
		return file[name], name + " in " + f.envFile
	}, nil
}

func (f *relayFlags) rawURL(env func(string) (string, string)) (rawURL, from string, err error) {
	switch {
	case f.file != "" && f.url != "":
		return "", "", errors.New("--relay and --relay-file: one of them")
	case f.file != "":
		text, err := os.ReadFile(f.file)
		return strings.TrimSpace(string(text)), f.file, err
	case f.url == "":
		rawURL, from = env("SMTP_URL")
		return rawURL, from, nil
	}
	u, err := url.Parse(f.url)
	switch {
	case err != nil && strings.Contains(f.url, "@"):
		return "", "", errors.New("--relay cannot be parsed as a URL; if there is a password in it, take it out: other users of this machine see the command line")
	case err == nil && u.User != nil:
		if _, has := u.User.Password(); has {
			return "", "", errors.New("--relay has a password, and other users of this machine see the command line: put the URL into SMTP_URL or a file (--relay-file), or the password into SMTP_PASSWORD")
		}
	}
	return f.url, "--relay", nil
}

func (f *relayFlags) password(env func(string) (string, string), ask bool, user, host string) (string, error) {
	if f.passwordFile != "" {
		text, err := os.ReadFile(f.passwordFile)
		return strings.TrimRight(string(text), "\r\n"), err
	}
	if password, _ := env("SMTP_PASSWORD"); password != "" || !ask {
		return password, nil
	}
	password, err := prompt(fmt.Sprintf("Password for %q at %s: ", user, host), true)
	if errors.Is(err, errNoTerminal) {
		return "", nil
	}
	return password, err
}

var errNoTerminal = errors.New("there is no terminal")

// prompt asks on the terminal of the process.
func prompt(question string, secret bool) (string, error) {
	if !term.IsTerminal(int(os.Stdin.Fd())) || !term.IsTerminal(int(os.Stderr.Fd())) {
		return "", errNoTerminal
	}
	fmt.Fprint(os.Stderr, question)
	if secret {
		answer, err := term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(os.Stderr)
		return string(answer), err
	}
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return strings.TrimSpace(line), err
}
