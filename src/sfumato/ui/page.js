() => {
  // Ctrl-Enter (or Cmd-Enter) draws from anywhere on the page.
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      document.querySelector('#sf-generate')?.click();
    }
  });
  const spoken = document.querySelector('#sf-spoken');
  spoken?.setAttribute('aria-live', 'polite');
  // On a narrow screen the picture is below the form: bring what has changed into view.
  const calm = matchMedia('(prefers-reduced-motion: reduce)');
  const seen = (element) => {
    const box = element.getBoundingClientRect();
    return box.top >= 0 && box.top < innerHeight - 120;
  };
  // Again until it is there: a re-layout ends a smooth scroll halfway. A person who scrolls has the last word.
  let wanted = '';
  let tries = 0;
  const bring = () => {
    const element = wanted && document.querySelector(wanted);
    if (!element || seen(element) || tries-- === 0) {
      wanted = '';
      return;
    }
    element.scrollIntoView({behavior: calm.matches ? 'auto' : 'smooth', block: 'start'});
    setTimeout(bring, 500);
  };
  const show = (selector) => {
    const idle = !wanted;
    [wanted, tries] = [selector, 10];
    if (idle) bring();
  };
  for (const kind of ['wheel', 'touchmove', 'pointerdown']) {
    addEventListener(kind, () => { wanted = ''; }, {passive: true});
  }
  let state = '';
  new MutationObserver(() => {
    const stage = document.querySelector('.sf-stage');
    if (stage && stage.dataset.state !== state) {
      if (state && stage.dataset.state !== 'idle') show('.sf-stage');
      state = stage.dataset.state;
    }
    const told = document.querySelector('.sf-error:not([data-seen])');
    if (told) {
      told.dataset.seen = 'yes';
      show('.sf-error');
    }
  }).observe(document.body, {childList: true, subtree: true});
}
